"""Tokens to the ranks of their experts and back (dispatch and combine): one contract, several ways."""
