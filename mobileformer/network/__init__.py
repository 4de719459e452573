"""The network in PyTorch: layers, blocks, the trunk of blocks with its tokens, the classifier."""
