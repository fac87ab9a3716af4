"""How busy the machines of a run are: measured by the workers at each evaluation, without a thread."""

import platform

import torch

from deit_ray.cluster.ray_private import nvml, psutil_of_ray

HOSTS_SHOWN = 8  # with more hosts, only the mean and the maximum over all are kept
Reading = tuple[str, dict[str, float]]  # a host, and its values by name


class SystemMeter:
    """Measures a worker's GPU, and its host.

    Args:
        device: the worker's.
        measures_host: whether this worker measures its host; one worker of each host does.
    """

    def __init__(self, device: torch.device, measures_host: bool):
        self.device, self.host = device, platform.node()
        self.psutil = psutil_of_ray() if measures_host else None
        self.gpu = GpuMeter(device) if device.type == "cuda" else None
        if self.psutil:
            self.psutil.cpu_percent()  # the first call only begins to count

    def read(self) -> Reading:
        """The host and its values, in percent.

        `cpu_percent` is the part of the CPUs' time that was used since the last call; `memory_percent` and
        `gpu_memory_percent` are in use now; `gpu_percent` is the part of the last second in which the GPU
        computed.
        """
        values = {}
        if self.psutil:
            values["cpu_percent"] = self.psutil.cpu_percent()
            values["memory_percent"] = self.psutil.virtual_memory().percent
        if self.gpu:
            values |= self.gpu.read()
        return self.host, values


class GpuMeter:
    """Measures a GPU with NVIDIA's library, as far as it answers: no statistic ends a run."""

    def __init__(self, device: torch.device):
        self.device, self.handle = device, None
        try:
            nvml().nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self.handle = nvml().nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (nvml().NVMLError, AttributeError):  # no NVIDIA GPU, or a part of one, which has no counter
            return

    def read(self) -> dict[str, float]:
        free, total = torch.cuda.mem_get_info(self.device)
        values = {"gpu_memory_percent": 100 * (total - free) / total}
        if self.handle is not None:
            try:
                values["gpu_percent"] = float(nvml().nvmlDeviceGetUtilizationRates(self.handle).gpu)
            except nvml().NVMLError:
                self.handle = None
        return values


def system_metrics(readings: list[Reading]) -> dict[str, float]:
    """The metrics of a run from the readings of all its workers.

    Returns:
        `system/NAME`, the mean over hosts, or over GPUs; `system/NAME_max` where there are several; and
        `system/HOST/NAME` of two to eight hosts.
    """
    metrics = {}
    hosts = sorted({host for host, _ in readings})
    for name in sorted({name for _, values in readings for name in values}):
        found = [(host, values[name]) for host, values in readings if name in values]
        metrics[f"system/{name}"] = _mean([value for _, value in found])
        if len(found) > 1:
            metrics[f"system/{name}_max"] = max(value for _, value in found)
        if 1 < len(hosts) <= HOSTS_SHOWN:
            for host in sorted({host for host, _ in found}):
                own = [value for other, value in found if other == host]
                metrics[f"system/{host}/{name}"] = _mean(own)
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
