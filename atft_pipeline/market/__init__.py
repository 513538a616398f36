"""From raw tables to adjusted prices: sources, contracts, calendar, universe, quarantine."""
