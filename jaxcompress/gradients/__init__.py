"""What scores and sensitivities share: sums of gradients and curvatures over batches."""
