"""What a run writes down: rows of metrics (the only truth), and the views that are made from them."""
