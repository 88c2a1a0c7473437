"""The full product of foldings and settings, gone through in shards and as many sittings as it takes."""
