"""What tests and proofs need to run on local ranks; nothing that trains uses it."""
