"""Parts of an export: the merge with its proof, and the model card."""
