"""What the workers measure of their machines, and what becomes of it over several hosts."""

import torch

from deit_ray.training.system import HOSTS_SHOWN, SystemMeter, system_metrics


def test_a_worker_measures_its_machine(device):
    meter = SystemMeter(device, measures_host=True)
    torch.randn(2000, 2000) @ torch.randn(2000, 2000)
    host, values = meter.read()
    assert host
    gpu = {"gpu_percent", "gpu_memory_percent"} if device.type == "cuda" else set()
    assert values.keys() == {"cpu_percent", "memory_percent"} | gpu
    assert all(0 <= value <= 100 for value in values.values())
    assert values["cpu_percent"] > 0
    assert SystemMeter(device, measures_host=False).read()[1].keys() == gpu


def test_the_mean_and_the_maximum_are_over_all_hosts_and_few_hosts_are_shown():
    assert system_metrics([("a", {"cpu_percent": 10.0})]) == {"system/cpu_percent": 10.0}
    two = [
        ("a", {"cpu_percent": 10.0, "gpu_percent": 50.0}),
        ("a", {"gpu_percent": 70.0}),
        ("b", {"cpu_percent": 30.0, "gpu_percent": 90.0}),
    ]
    assert system_metrics(two) == {
        "system/cpu_percent": 20.0,
        "system/cpu_percent_max": 30.0,
        "system/a/cpu_percent": 10.0,
        "system/b/cpu_percent": 30.0,
        "system/gpu_percent": 70.0,
        "system/gpu_percent_max": 90.0,
        "system/a/gpu_percent": 60.0,
        "system/b/gpu_percent": 90.0,
    }
    many = [(f"host{number}", {"cpu_percent": float(number)}) for number in range(HOSTS_SHOWN + 1)]
    assert system_metrics(many) == {"system/cpu_percent": 4.0, "system/cpu_percent_max": 8.0}
