"""What an export needs: merging with its proof, and the model card."""
