"""A probe that reports what LBGM would save in a training that runs without it.

``python -m lbgm_compress.probe script.py [args]`` attaches it to an unmodified script that steps an
optimizer of torch's, and prints the report when the script ends.

>>> import torch
>>> from lbgm_compress.probe import LookBackProbe
>>> model = torch.nn.Linear(20, 5)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> probe = LookBackProbe(model)
>>> for step in range(3):
...     optimizer.zero_grad()
...     model(torch.ones(8, 20)).square().mean().backward()
...     optimizer.step()
>>> [round(row.recycled_share, 2) for row in probe.report().all_tensors()][:2]
[0.67, 0.67]
"""

from lbgm_compress.probe.look_back_probe import DELTAS, LookBackProbe
from lbgm_compress.probe.report import Report, Row

__all__ = ["DELTAS", "LookBackProbe", "Report", "Row"]
