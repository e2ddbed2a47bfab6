"""The function whose curvature is meant: model, loss and data, averaged with the right weights, left as they were."""
