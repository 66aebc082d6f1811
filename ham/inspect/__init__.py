"""What a trained model keeps of one text: which tokens each layer routed, and of what kind."""
