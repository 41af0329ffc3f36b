"""Processors and memory of control groups, in trees laid out as container runtimes do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmerge_models.machine import resident_memory, usable_memory, usable_processors

GB = 10**9
_OWN = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_NONE = 9223372036854771712
"""What version 1 writes where there is no limit."""


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have 64 processors and a TB, so that only the trees limit."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 250 * 10**6, "SC_PAGE_SIZE": 4000}.get)


def tree(root: Path, *, cgroup: str, mounts: str) -> Path:
    process = root / "proc" / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text(mounts)
    return root


def limits(root: Path, group: str, **files: object) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


_V2 = (
    "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
)


def v1_mounts(root: str) -> str:
    return "".join(
        f"{40 + n} 31 0:{50 + n} {root} /sys/fs/cgroup/{name} ro,nosuid master:{n} - cgroup cgroup "
        f"rw,{name}\n"
        for n, name in enumerate(("cpu,cpuacct", "memory", "pids"))
    )


def test_docker_with_version_2_shows_the_container_as_the_root(tmp_path: Path) -> None:
    root = tree(tmp_path, cgroup="0::/\n", mounts=_V2.format(root="/"))
    limits(root, "", cpu__max="250000 100000", memory__max=4 * GB, memory__high="max")
    assert usable_processors(root) == 2.5
    assert usable_memory(root) == 4 * GB


def test_kubernetes_with_version_2_limits_the_pod_above_the_container(tmp_path: Path) -> None:
    pod = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice"
    container = f"{pod}/cri-containerd-1f.scope"
    root = tree(tmp_path, cgroup=f"0::/{container}\n", mounts=_V2.format(root="/"))
    limits(root, container, cpu__max="max 100000", memory__max="max", memory__high="max")
    limits(root, pod, cpu__max="400000 100000", memory__max=16 * GB, memory__high=12 * GB)
    limits(root, "kubepods.slice", cpu__max="6000000 100000", memory__max=200 * GB)
    assert usable_processors(root) == 4
    assert usable_memory(root) == 12 * GB


def test_a_service_of_systemd_lies_in_a_slice_that_has_a_limit_of_its_own(tmp_path: Path) -> None:
    group = "system.slice/merge.service"
    root = tree(tmp_path, cgroup=f"0::/{group}\n", mounts=_V2.format(root="/"))
    limits(root, group, cpu__max="800000 100000", memory__max=8 * GB, memory__high=7 * GB)
    limits(root, "system.slice", cpu__max="150000 100000", memory__max="max")
    assert usable_processors(root) == 1.5
    assert usable_memory(root) == 7 * GB


def test_a_step_of_slurm_is_limited_by_its_job(tmp_path: Path) -> None:
    job = "system.slice/slurmstepd.scope/job_7"
    group = f"{job}/step_0/user/task_0"
    root = tree(tmp_path, cgroup=f"0::/{group}\n", mounts=_V2.format(root="/"))
    limits(root, group, memory__max="max")
    limits(root, job, memory__max=96 * GB)
    assert usable_processors(root) == 64
    assert usable_memory(root) == 96 * GB


def test_a_host_path_in_a_container_that_sees_its_own_group_alone(tmp_path: Path) -> None:
    # Docker with the host's namespace of groups: the mount's root is the container's group.
    group = "/system.slice/docker-0a1b.scope"
    root = tree(tmp_path, cgroup=f"0::{group}/inner\n", mounts=_V2.format(root=group))
    limits(root, "", cpu__max="300000 100000", memory__max=6 * GB)
    limits(root, "inner", cpu__max="200000 100000", memory__max="max")
    assert (usable_processors(root), usable_memory(root)) == (2, 6 * GB)


@pytest.mark.parametrize("path", ["/../other", "/not/below/the/mount"])
def test_a_group_outside_of_what_is_mounted_counts_by_the_mount(tmp_path: Path, path: str) -> None:
    root = tree(tmp_path, cgroup=f"0::{path}\n", mounts=_V2.format(root="/mine"))
    limits(root, "", cpu__max="300000 100000", memory__max=6 * GB)
    assert (usable_processors(root), usable_memory(root)) == (3, 6 * GB)


def test_docker_with_version_1(tmp_path: Path) -> None:
    path = "/docker/0a1b"
    root = tree(
        tmp_path,
        cgroup=f"5:pids:{path}\n4:memory:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:{path}\n",
        mounts=v1_mounts(path),
    )
    limits(root, "cpu,cpuacct", cpu__cfs_quota_us=350000, cpu__cfs_period_us=100000)
    limits(root, "memory", memory__limit_in_bytes=3 * GB)
    assert (usable_processors(root), usable_memory(root)) == (3.5, 3 * GB)


def test_nested_groups_of_version_1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        cgroup="4:memory:/kubepods/pod7/0a\n3:cpu,cpuacct:/kubepods/pod7/0a\n",
        mounts=v1_mounts("/"),
    )
    for group, quota in {
        "": -1,
        "kubepods": -1,
        "kubepods/pod7": 50000,
        "kubepods/pod7/0a": -1,
    }.items():
        limits(root, f"cpu,cpuacct/{group}", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    for group, limit in {"": _NONE, "kubepods/pod7": 5 * GB, "kubepods/pod7/0a": _NONE}.items():
        limits(root, f"memory/{group}", memory__limit_in_bytes=limit)
    assert (usable_processors(root), usable_memory(root)) == (0.5, 5 * GB)


def test_a_limit_of_version_1_above_what_the_container_sees(tmp_path: Path) -> None:
    path = "/kubepods/pod7/0a"
    root = tree(tmp_path, cgroup=f"4:memory:{path}\n", mounts=v1_mounts(path))
    limits(
        root,
        "memory",
        memory__limit_in_bytes=_NONE,
        memory__stat=f"cache 0\nhierarchical_memory_limit {2 * GB}\nhierarchical_memsw_limit 1",
    )
    assert usable_memory(root) == 2 * GB


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    unified = "50 31 0:60 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    root = tree(tmp_path, cgroup="4:memory:/job\n0::/job\n", mounts=v1_mounts("/") + unified)
    limits(root, "memory/job", memory__limit_in_bytes=9 * GB)
    limits(root, "unified/job", cpu__max="700000 100000")
    assert (usable_processors(root), usable_memory(root)) == (7, 9 * GB)


def test_a_folder_with_a_blank_in_its_name(tmp_path: Path) -> None:
    mounts = r"30 23 0:26 / /sys/fs/my\040groups rw - cgroup2 cgroup2 rw" + "\n"
    root = tree(tmp_path, cgroup="0::/a b\n", mounts=mounts)
    limits(root, "../my groups/a b", memory__max=GB)
    assert usable_memory(root) == GB


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert (usable_processors(tmp_path), usable_memory(tmp_path)) == (64, 10**12)


def test_a_process_bound_to_processors_has_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_processors(Path("/nowhere")) == 2


_DAMAGED = st.one_of(
    st.sampled_from(
        ["", "max", "max max", "-1", "0 0", "100000", "1 2 3", "1e9", "0", "\0", "٣ ٤"]
    ),
    st.text(max_size=30),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


@settings(max_examples=60)
@given(content=st.lists(_DAMAGED, min_size=6, max_size=6), lines=st.lists(_DAMAGED, max_size=4))
def test_damaged_files_never_fail(
    content: list[bytes], lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tree(
        tmp_path_factory.mktemp("damaged"),
        cgroup="4:memory:/a\n3:cpu,cpuacct:/a\n0::/a\n",
        mounts=_V2.format(root="/") + v1_mounts("/"),
    )
    files = ("cpu.max", "memory.max", "memory.high", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    for group in ("", "a", "cpu,cpuacct/a", "memory/a"):
        limits(root, group)
        for name, text in zip((*files, "memory.stat"), content, strict=True):
            (root / "sys/fs/cgroup" / group / name).write_bytes(text)
    assert 0 < usable_processors(root) <= 64
    assert 0 < usable_memory(root) <= 10**12
    for name in ("cgroup", "mountinfo"):
        with (root / "proc/self" / name).open("ab") as file:
            file.write(b"\n".join(lines))
    assert 0 < usable_processors(root) <= 64
    assert 0 < usable_memory(root) <= 10**12


def test_files_that_are_folders_or_may_not_be_read_limit_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path, cgroup="0::/a\n", mounts=_V2.format(root="/"))
    limits(root, "a", memory__high=GB)
    (root / "sys/fs/cgroup/a/cpu.max").mkdir()
    (root / "sys/fs/cgroup/a/memory.max").symlink_to("nowhere")
    assert (usable_processors(root), usable_memory(root)) == (64, GB)


@pytest.fixture
def real_group() -> Iterator[Path]:
    """Yield a control group of this machine with 768 MiB, within the one that the tests run in."""
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = parent / f"starmerge-test-{os.getpid()}"
        file = "memory.limit_in_bytes" if parent.name == "memory" else "memory.max"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(768 * 2**20))
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("No control group can be made here: that takes root and a writable cgroup tree.")


def test_a_real_group_is_the_limit_of_a_process_in_it(real_group: Path) -> None:
    (real_group / "inner").mkdir()
    script = (
        "import pathlib, sys; pathlib.Path(sys.argv[1], 'cgroup.procs').write_text('0');"
        "from starmerge_models.machine import usable_memory; print(usable_memory())"
    )
    try:
        run = subprocess.run(
            [sys.executable, "-c", script, real_group / "inner"],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        (real_group / "inner").rmdir()
    assert run.stdout.strip() == str(768 * 2**20), run.stderr


def test_this_process_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    held = resident_memory()
    assert held is not None
    assert 2**20 < held < _OWN
