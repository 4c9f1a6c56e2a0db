"""Declared workflows: their form, their templates and the fold that says what runs next."""
