"""Which way of training fits the budget and loses least? The only place that chooses."""
