"""The part of both filters that NVFlare's job API calls."""

from __future__ import annotations

from typing import Any

from nvflare.apis.dxo_filter import DXOFilter

__all__ = ["PackageFilter"]

PACKAGE = "lbgm_compress"


class PackageFilter(DXOFilter):
    """A filter of this package, which is installed at all sites and not copied into jobs."""

    def add_to_fed_job(self, job: Any, ctx: Any, **kwargs: Any) -> None:
        """Add the filter to a job.

        NVFlare would copy single modules of the package into the job, and import these at the sites
        in the place of the installed package.
        """
        packages = job.job.app_packages
        if PACKAGE not in packages:
            job.set_app_packages([*packages, PACKAGE])
        super().add_to_fed_job(job, ctx, **kwargs)
