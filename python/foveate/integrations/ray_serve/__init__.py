"""foveate serve on several processes and machines: a Ray Serve application. Needs `pip install "foveate[ray]"`.

from ray import serve
from foveate.integrations import ray_serve
from foveate.serve import ServeSettings

serve.run(ray_serve.application(ServeSettings(models={"chat": "./model"}), replicas=(1, 4)), route_prefix="/")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.serve.settings import ServeSettings

__all__ = ["application"]


def application(
    settings: ServeSettings,
    *,
    replicas: int | tuple[int, int] = 1,
    target_ongoing_requests: float = 8.0,
    max_ongoing_requests: int = 256,
    prefix_imbalance: int = 8,
    tries: int = 3,
    actor_options: dict[str, Any] | None = None,
) -> Any:
    """What `ray.serve.run` takes: replicas that each serve the settings' models with an engine of their own, behind one ingress.

    replicas: how many, or (least, most): then there are as many as keep target_ongoing_requests of them running in each.
    max_ongoing_requests: of a replica; what is beyond waits in the ingress, and the replica's own queue answers 429 before.
    A request goes where the longest beginning of its prompt has been, unless that replica has prefix_imbalance more requests than the
    idlest one. tries: how often a request begins again after its replica died; only while its client has seen nothing of it.
    actor_options: Ray's for a replica, such as {"num_cpus": 8}.

    host, port and TLS of the settings mean nothing here, since Ray's proxy listens. Limits of keys are for each replica.
    """
    try:
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from foveate.integrations.ray_serve.ingress import build_ingress
        from foveate.integrations.ray_serve.prefix_router import PrefixRouter
        from foveate.integrations.ray_serve.replica import Replica
    except ImportError as error:
        raise ImportError(f'this needs {error.name}, which is not installed: pip install "foveate[ray]"') from error
    least, most = replicas if isinstance(replicas, tuple) else (replicas, replicas)
    if not 1 <= least <= most:
        raise ValueError(f"replicas={replicas} must be a number from 1, or (least, most) with 1 <= least <= most")
    if tries < 1:
        raise ValueError(f"tries={tries} must be 1 or more")
    scale: dict[str, Any] = {"num_replicas": least}
    if least < most:
        bounds = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target_ongoing_requests}
        scale = {"autoscaling_config": bounds}
    deployed = serve.deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options=actor_options or {},
        graceful_shutdown_timeout_s=settings.drain_timeout,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"imbalance": prefix_imbalance}
        ),
        **scale,
    )
    return build_ingress(deployed.bind(settings), tries, settings.max_body_bytes)
