"""What a signal is, and its physics: data sets, and the batches made of them."""
