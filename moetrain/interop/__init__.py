"""Living inside other people's models: Megatron-Core, Hugging Face."""
