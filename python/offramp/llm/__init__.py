"""Early exits on Hugging Face causal language models: everything that needs torch and transformers."""
