"""What the length head has to beat: empirical quantiles, linear quantile regression and gradient boosting."""
