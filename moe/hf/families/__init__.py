"""One short file per family of Hugging Face models: names, configuration, weights."""
