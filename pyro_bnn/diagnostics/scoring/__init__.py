"""How good predictions are: scores and metrics, streamed over data of any accepted form."""
