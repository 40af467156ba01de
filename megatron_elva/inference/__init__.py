"""Asking a trained run: the model on plain transformers, and chat. The Hugging Face export has its place here."""
