"""The rule table: what each cause looks like in the record."""
