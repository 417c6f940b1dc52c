"""The demonstration application."""
