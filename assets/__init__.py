"""The Dagster side: joins the library and the resources into assets, checks and schedules."""
