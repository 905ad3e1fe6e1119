"""What can go wrong. Each fault is done to a run that trains, and returns how many attempts it must cost."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from scene import Scene

SLOW_S = 3.0  # that an fsync takes on the slow disk


def kill_trainer(scene: Scene) -> int:
    """kill -9 of any rank."""
    os.kill(scene.random.choice(scene.ranks())["pid"], signal.SIGKILL)
    return 1


def stop_rank(scene: Scene) -> int:
    """SIGSTOP of any rank: it hangs, and so do all that wait for it."""
    os.kill(scene.random.choice(scene.ranks())["pid"], signal.SIGSTOP)
    return 1


def kill_driver(scene: Scene) -> int:
    """kill -9 of the command that the user started; it is started again, and finds the run."""
    assert scene.driver is not None
    scene.driver.kill()
    scene.driver.wait()
    time.sleep(scene.random.uniform(0, 3))
    scene.start_driver()
    return 0


def kill_supervisor(scene: Scene) -> int:
    """kill -9 of the supervisor; Ray makes it anew, and it begins another attempt."""
    os.kill(scene.events("supervisor_started")[-1]["pid"], signal.SIGKILL)
    return 1


def kill_builder(scene: Scene) -> int:
    """kill -9 of a data actor; another one takes its place, and training waits at most."""
    builders = [p for p in psutil.process_iter(["cmdline"]) if "ray::Builder" in " ".join(p.info["cmdline"] or ())]
    scene.random.choice(builders).kill()
    return 0


def kill_node(scene: Scene) -> int:
    """A whole node with its ranks, all at once; a new one comes some seconds later."""
    hosts = {rank["node"] for rank in scene.ranks()}
    victims = [node for node in scene.nodes if node.node_ip_address in hosts]
    victim = scene.random.choice(victims)
    scene.cluster.remove_node(victim, allow_graceful=False)
    scene.nodes.remove(victim)
    time.sleep(scene.random.uniform(0, 5))
    scene.nodes.append(scene.add_node())
    return 1


def truncate_newest(scene: Scene) -> int:
    """The newest checkpoint loses half a file, and a rank dies: the one before must do."""
    scene.wait(lambda: len(scene.checkpoints()) >= 2, "two checkpoints")
    model = scene.checkpoints()[-1] / scene.random.choice(["model.safetensors", "optimizer.safetensors"])
    os.truncate(model, model.stat().st_size // 2)
    fallbacks = len(scene.ledger("fallback"))
    kill_trainer(scene)
    scene.wait(lambda: len(scene.ledger("fallback")) > fallbacks, "a fallback")
    return 1


def fill_disk(scene: Scene) -> int:
    """No room for the next checkpoint; training goes on, and saves again once there is room."""
    failed = len(scene.ledger("checkpoint_failed"))
    ballast = scene.run / "checkpoints" / "ballast"

    def failed_for_room() -> bool:
        fill(ballast)  # again: old checkpoints are deleted, and make room
        return len(scene.ledger("checkpoint_failed")) > failed

    scene.wait(failed_for_room, "a failed save")
    ballast.unlink()
    return 0


def slow_disk(scene: Scene) -> int:
    """Every fsync takes seconds, and a rank dies while a checkpoint is written."""
    (scene.folder / "slow").write_text(str(SLOW_S))
    scene.wait(lambda: list((scene.run / "checkpoints").glob(".step_*")), "a save under way")
    (scene.folder / "slow").unlink()
    return kill_trainer(scene)


def fill(ballast: Path) -> None:
    """Take all the room that is left on its disk."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 14))


FAULTS: dict[str, Callable[[Scene], int]] = {
    fault.__name__: fault
    for fault in (
        kill_trainer,
        stop_rank,
        kill_driver,
        kill_supervisor,
        kill_builder,
        kill_node,
        truncate_newest,
        fill_disk,
        slow_disk,
    )
}
