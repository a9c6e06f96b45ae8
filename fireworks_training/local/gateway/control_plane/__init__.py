"""The control plane: trainer jobs, deployments, hot loads and promotions, and their routes.

`routes` says where a new route goes.
"""
