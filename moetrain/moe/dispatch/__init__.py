"""Rows to where their experts are, and results home: one contract, several ways."""
