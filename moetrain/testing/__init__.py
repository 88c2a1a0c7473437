"""Local ranks, for tests and for `moetrain verify`; nothing that trains uses them."""
