"""Clocks and temperatures around a measurement, from files and a program made for the purpose."""

import pytest

from pyllm.bench import record, sensors


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes what a machine's sensors say; without an `nvidia-smi` until one is given."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def say(mhz, celsius, smi=None):
        for i, clock in enumerate(mhz):
            write(f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq", clock * 1000)
        for i, degrees in enumerate(celsius):
            write(f"sys/class/thermal/thermal_zone{i}/temp", degrees)
        if smi is not None:
            write("bin/nvidia-smi", f"#!/bin/sh\necho '{smi}'\n").chmod(0o755)
        return sensors.read(tmp_path / "sys")

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
        return path

    return say


def test_readings(machine):
    assert machine([], []) == {}
    found = machine([3000, 3200, 1000], [41000, "no number", 63500])
    assert found == {"cpu_mhz": 3000, "cpu_celsius": 63.5}


def test_a_slower_clock_is_remarked_upon(machine):
    before, same, slower = machine([3000], []), machine([2900], []), machine([2000], [])
    assert sensors.remarks(before, same) == sensors.remarks({}, slower) == []
    assert sensors.remarks(before, slower) == ["the processor's clock fell from 3000 to 2000 MHz"]


def test_a_gpu_that_is_held_back_is_remarked_upon(machine):
    idle = machine([], [], "1980, 1980, 35, 0x0000000000000001")
    assert idle["gpu_celsius"] == 35
    assert sensors.remarks({}, idle) == []
    hot = machine([], [], "1200, 1980, 88, 0x0000000000000064")
    assert sensors.remarks(idle, hot) == [
        "the GPU ran at 1200 of 1980 MHz, held back by heat, power cap"
    ]


@pytest.mark.parametrize("smi", ["", "No devices were found", "[N/A], 1980, 35, 0x1"])
def test_a_gpu_that_says_nothing(machine, smi):
    assert machine([], [], smi) == {}


def test_doubts_name_all_that_is_known(machine):
    where = {"contended": True, "busy_cores": 0.5, "sensors": {"cpu_mhz": 3000.0}}
    assert record.doubts(where, {"cpu_mhz": 1500.0}) == [
        "the processor's clock fell from 3000 to 1500 MHz",
        "contended: others kept 0.5 cores busy before",
    ]
