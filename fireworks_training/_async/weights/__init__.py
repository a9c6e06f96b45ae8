"""The way of new weights into the deployment: save, hot load, verified live, sampled."""
