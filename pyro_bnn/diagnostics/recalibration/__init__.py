"""Making predictions as confident as they are right, on held-out data: temperature scaling and conformal prediction."""
