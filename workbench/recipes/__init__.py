"""How what comes along was made: trained models and editors, tables of results."""
