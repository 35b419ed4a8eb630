"""provenance.json: how a patch came about, as an in-toto statement with an SLSA v1 provenance predicate.

It is made from the manifest and the digests of the files beside it, and says nothing that the manifest does not: in a
form that tools for supply chains read. Specification: https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import PurePath
from typing import Any

from patchkit.patch.bases import is_path, public_name
from patchkit.patch.manifest import Manifest, Run
from patchkit.version import DISTRIBUTION

BUILD_TYPE = "urn:patchkit:run:v1"
_PACKAGES = {"patchkit": DISTRIBUTION}


def provenance_text(manifest: Manifest, files: Mapping[str, str]) -> str:
    """provenance.json of the patch whose files have these sha256 digests."""
    return json.dumps(provenance(manifest, files), indent=1, ensure_ascii=False) + "\n"


def provenance(manifest: Manifest, files: Mapping[str, str]) -> dict[str, Any]:
    """The statement about a patch: about its last run, which went on from the patch named among the dependencies."""
    run = manifest.history[-1]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "action": run.action,
                    "command": list(run.origin.command) if run.origin else None,
                    "method": run.method,
                    "recipe": run.recipe,
                    "facts": list(run.facts),
                },
                "internalParameters": {
                    "seed": run.recipe.get("seed"),
                    "device": run.versions.get("device"),
                    "dtype": run.versions.get("dtype"),
                    "recipeDigest": run.recipe_digest,
                },
                "resolvedDependencies": list(_dependencies(manifest, run)),
            },
            "runDetails": {
                "builder": {
                    "id": f"pkg:pypi/{DISTRIBUTION}@{run.versions.get('patchkit', 'unknown')}",
                    "version": dict(run.versions),
                },
                "metadata": {
                    "invocationId": f"{manifest.digest}/{len(manifest.history)}",
                    "startedOn": _time(run, sum(run.seconds.values())),
                    "finishedOn": _time(run),
                },
                "byproducts": list(_byproducts(run)),
            },
        },
    }


def _dependencies(manifest: Manifest, run: Run) -> Iterator[dict[str, Any]]:
    """The base, the patch that the run went on from, the facts, the text, the packages."""
    base = manifest.base
    name = public_name(base.name)
    uri = f"file:{name}" if is_path(name) or not name else f"hf:{name}{f'@{base.commit}' if base.commit else ''}"
    digest = {"gitCommit": base.commit} if base.commit else {}
    yield {"name": "base", "uri": uri, "digest": digest, "annotations": {"weights": dict(base.weights)}}
    for parent in manifest.parents:
        yield {"name": "patch", "uri": f"urn:patchkit:patch:{parent}", "digest": {"sha256": parent}}
    if run.origin and run.origin.facts_sha256:
        yield {"name": "facts", "uri": f"file:{run.origin.facts}", "digest": {"sha256": run.origin.facts_sha256}}
    if run.text.sha256:
        yield {"name": "text", "uri": f"file:{run.text.source}", "digest": {"sha256": run.text.sha256}}
    if run.source:
        for file, sha256 in run.source.digests.items():
            yield {"name": run.source.kind, "uri": f"file:{PurePath(run.source.name).name}#{file}"} | {
                "digest": {"sha256": sha256}
            }
    for package, version in run.versions.items():
        if package not in ("device", "dtype", "python"):
            yield {"name": package, "uri": f"pkg:pypi/{_PACKAGES.get(package, package)}@{version}"}


def _byproducts(run: Run) -> Iterator[dict[str, Any]]:
    if run.origin and run.origin.report:
        yield {"name": "report.json", "digest": {"sha256": run.origin.report}}


def _time(run: Run, before: float = 0.0) -> str:
    """When the run ended, or so many seconds before."""
    ended = datetime.fromisoformat(run.when.replace("Z", "+00:00"))
    return (ended - timedelta(seconds=min(before, 1e8))).isoformat(timespec="seconds")
