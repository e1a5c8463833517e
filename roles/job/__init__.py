"""job: the training that the cluster is for, as desired state: absent, it is started; interrupted, resumed."""

from roles.core.role import Role
from roles.job.converge import converge
from roles.job.declared import members
from roles.job.drift import drift, remarks
from roles.job.probe import JobState, parse, probe
from roles.job.spec import JobSpec


def busy(state: JobState) -> str | None:
    """Any job that runs here, also one that another file declares."""
    return next((f"job {unit.job}" for unit in state.units if unit.runs), None)


role: Role[JobSpec, JobState] = Role(
    name="job",
    section="runs",
    spec=JobSpec,
    default=JobSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    needs=("storage", "environment", "ops", "trainer"),
    seconds=30,
    together=members,
    busy=busy,
    remarks=remarks,
)
