"""Recipes: how the small models that come along were made, one command each."""
