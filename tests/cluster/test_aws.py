"""cluster/aws.yaml and aws-setup.yaml sent through CloudFormation, Ray's schema and Ray's own code to a simulated AWS.

What is asserted is what arrives there: security groups, instance requests, policies, docker's command line.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import boto3
import botocore.client
import pytest
import yaml
from moto import mock_aws
from moto.core import set_initial_no_auth_action_count

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
REGION, ZONE, SSH_CIDR = "us-east-1", "us-east-1a", "10.8.0.0/16"
PLACES = {"VpcId": "", "SshCidr": SSH_CIDR, "DataBucket": "data", "RunsBucket": "runs"}


pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS..EC2")  # resources that moto does not simulate


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """An account with the stack in it, and aws.yaml filled in and bootstrapped by Ray: {config, group, sent}."""
    from ray.autoscaler._private.aws import config as ray_aws
    from ray.autoscaler._private.aws.utils import resource_cache
    from ray.autoscaler._private.util import prepare_config, validate_config

    home = tmp_path_factory.mktemp("home")
    for name in (".ray/auth_token", ".nltrain/env"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {"HOME": str(home), "AWS_DEFAULT_REGION": REGION, **_keys("owner", "owner")}.items():
            patch.setenv(name, value)
        patch.setattr(boto3, "DEFAULT_SESSION", None)
        resource_cache.cache_clear()
        sent = []
        call = botocore.client.BaseClient._make_api_call
        patch.setattr(
            botocore.client.BaseClient,
            "_make_api_call",
            lambda client, name, values: sent.append((name, values)) or call(client, name, values),
        )
        ec2 = boto3.client("ec2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone=ZONE)["Subnet"]["SubnetId"]
        outputs = deploy(PLACES | {"VpcId": vpc})
        text = (CLUSTER / "aws.yaml").read_text()
        for place, value in {"subnet": subnet, "sg": outputs["SecurityGroup"], "ami": _image(ec2)}.items():
            assert len(re.findall(rf"\b{place}-REPLACE\b", text)) == 1, f"{place}-REPLACE has to be filled in once"
            text = text.replace(f"{place}-REPLACE", value)
        config = yaml.safe_load(text)
        validate_config(config)
        config = ray_aws.bootstrap_aws(prepare_config(config))
        validate_config({name: value for name, value in config.items() if name != "head_node"})
        yield {"config": config, "group": outputs["SecurityGroup"], "subnet": subnet, "sent": sent}
    resource_cache.cache_clear()


def deploy(places: dict[str, str]) -> dict[str, str]:
    """The stack's outputs."""
    cloud = boto3.client("cloudformation")
    cloud.create_stack(
        StackName="nltrain",
        TemplateBody=(CLUSTER / "aws-setup.yaml").read_text(),
        Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in places.items()],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    [stack] = cloud.describe_stacks(StackName="nltrain")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}


def template() -> dict:
    """aws-setup.yaml with CloudFormation's tags as (tag, value)."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: (tag, loader.construct_scalar(node)))
    return yaml.load((CLUSTER / "aws-setup.yaml").read_text(), Loader)


def _image(ec2) -> str:
    return ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]


def _keys(key: str, secret: str) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}


def start(aws, node_type: str) -> dict:
    """One node of this type by Ray's provider; what RunInstances was asked for."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = aws["config"]
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node_config = config["available_node_types"][node_type]["node_config"]
    provider.create_node(node_config, {"ray-node-kind": "worker", "ray-user-node-type": node_type}, 1)
    return [values for name, values in aws["sent"] if name == "RunInstances"][-1]


def test_head_and_workers_are_started_in_one_group_and_subnet(aws):
    head = start(aws, "head")
    assert head["SecurityGroupIds"] == [aws["group"]]
    assert head["SubnetId"] == aws["subnet"]
    assert head["IamInstanceProfile"] == {"Name": "nltrain-head"}
    worker = start(aws, "gpu")
    assert worker["IamInstanceProfile"] == {"Name": "nltrain-worker"}
    assert worker["Placement"]["GroupName"] == template()["Resources"]["PlacementGroup"]["Properties"]["GroupName"]
    assert {(*card["Groups"], card["SubnetId"]) for card in worker["NetworkInterfaces"]} == {
        (aws["group"], aws["subnet"])
    }


def test_every_network_card_of_the_instance_type_is_asked_for_with_efa(aws):
    cards = start(aws, "gpu")["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(32))
    assert [card["DeviceIndex"] for card in cards] == [0] + 31 * [1]
    assert [card["InterfaceType"] for card in cards] == ["efa"] + 31 * ["efa-only"]


def test_the_group_lets_its_nodes_reach_each_other_both_ways_and_ssh_in_from_the_named_addresses_only(aws):
    [group] = boto3.client("ec2").describe_security_groups(GroupIds=[aws["group"]])["SecurityGroups"]
    everything = [rule for rule in group["IpPermissions"] if rule["IpProtocol"] == "-1"]
    assert [pair["GroupId"] for rule in everything for pair in rule["UserIdGroupPairs"]] == [aws["group"]]
    # The simulated cloud knows no rules outwards as resources: here the template is what there is to look at.
    outwards = template()["Resources"]["GroupOut"]
    assert outwards["Type"] == "AWS::EC2::SecurityGroupEgress"
    own = ("GetAtt", "Group.GroupId")
    assert outwards["Properties"] == {"GroupId": own, "IpProtocol": "-1", "DestinationSecurityGroupId": own}
    open_ports = [
        (rule["FromPort"], rule["ToPort"], address["CidrIp"])
        for rule in group["IpPermissions"]
        for address in rule["IpRanges"]
    ]
    assert open_ports == [(22, 22, SSH_CIDR)]
    # Ray made no group of its own.
    assert "CreateSecurityGroup" not in [name for name, _ in aws["sent"] if name != "CreateStack"]


def as_role(name: str) -> dict[str, str]:
    """Credentials that a node with this role has."""
    arn = boto3.client("iam").get_role(RoleName=name)["Role"]["Arn"]
    found = boto3.client("sts").assume_role(RoleArn=arn, RoleSessionName="node")["Credentials"]
    return _keys(found["AccessKeyId"], found["SecretAccessKey"]) | {"AWS_SESSION_TOKEN": found["SessionToken"]}


@pytest.mark.parametrize(("role", "may"), [("nltrain-head", True), ("nltrain-worker", False)])
def test_the_head_may_start_and_end_workers_and_a_worker_may_not(aws, monkeypatch, role, may):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.aws.utils import resource_cache
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    for name, value in as_role(role).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    resource_cache.cache_clear()
    config = aws["config"]

    @set_initial_no_auth_action_count(0)
    def begin_and_end() -> list[str]:
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        node_config = config["available_node_types"]["gpu"]["node_config"]
        nodes = provider.create_node(node_config, {"ray-node-kind": "worker"}, 1)
        provider.non_terminated_nodes({})
        provider.set_node_tags(next(iter(nodes)), {"ray-node-status": "up-to-date"})
        provider.terminate_nodes(list(nodes))
        return list(nodes)

    try:
        if may:
            assert begin_and_end()
        else:
            monkeypatch.setattr("ray.autoscaler._private.aws.node_provider.BOTO_CREATE_MAX_RETRIES", 1)
            with pytest.raises(NodeLaunchException) as refused:
                begin_and_end()
            assert "not authorized to perform: ec2:RunInstances" in refused.value.description
    finally:
        resource_cache.cache_clear()


def policies(role: str) -> list[dict]:
    """Every statement that counts for a role."""
    iam = boto3.client("iam")
    found = [
        iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    ]
    for policy in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        version = iam.get_policy(PolicyArn=policy["PolicyArn"])["Policy"]["DefaultVersionId"]
        found.append(
            iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId=version)["PolicyVersion"]["Document"]
        )
    documents = [json.loads(each) if isinstance(each, str) else each for each in found]
    return [statement for document in documents for statement in document["Statement"]]


def allowed(role: str, action: str) -> list[str]:
    """The resources on which a role may do this."""
    listed = [
        statement["Resource"]
        for statement in policies(role)
        if action in statement["Action"] or statement["Action"] == action
    ]
    return [resource for each in listed for resource in (each if isinstance(each, list) else [each])]


def test_the_policies_name_no_more_than_is_needed(aws):
    worker = boto3.client("iam").get_role(RoleName="nltrain-worker")["Role"]["Arn"]
    assert allowed("nltrain-head", "iam:PassRole") == [worker]
    assert allowed("nltrain-worker", "iam:PassRole") == []
    for role in ("nltrain-head", "nltrain-worker"):
        assert allowed(role, "ecr:GetAuthorizationToken") == ["*"]
        assert [each.rpartition(":")[2] for each in allowed(role, "ecr:BatchGetImage")] == ["repository/nltrain"]
        assert allowed(role, "s3:PutObject") == ["arn:aws:s3:::runs/*"]
        assert sorted(allowed(role, "s3:GetObject")) == ["arn:aws:s3:::data/*", "arn:aws:s3:::runs/*"]
        assert sorted(allowed(role, "s3:ListBucket")) == ["arn:aws:s3:::data", "arn:aws:s3:::runs"]


class Recorder:
    """Stands for ssh: keeps the commands, answers what Ray asks docker about."""

    def __init__(self):
        self.commands = []

    def check_call(self, command, **_):
        self.commands.append(command[-1])

    def check_output(self, command, **_):
        self.commands.append(command[-1])
        answers = {".Config.Env": b'["HOME=/home/nltrain"]', ".Runtimes": b"nvidia-container-runtime", "MemAv": b"1"}
        if ".State.Running" in command[-1]:
            return b"false"
        return next((answer for question, answer in answers.items() if question in command[-1]), b"")


def commands_on_the_host(aws, as_head: bool, tmp_path: Path) -> list[str]:
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    config, recorder = aws["config"], Recorder()

    class Provider:
        def internal_ip(self, _):
            return "10.0.0.9"

        external_ip = internal_ip

    runner = DockerCommandRunner(
        config["docker"],
        log_prefix="",
        node_id="i-1",
        provider=Provider(),
        auth_config=config["auth"],
        cluster_name=config["cluster_name"],
        process_runner=recorder,
        use_internal_ip=True,
    )
    for command in config["initialization_commands"]:
        runner.run(command, run_env="host")
    runner.run_init(as_head=as_head, file_mounts=config["file_mounts"], sync_run_yet=True)
    return recorder.commands


@pytest.mark.parametrize("as_head", [True, False])
def test_docker_is_logged_in_before_it_pulls_and_gets_the_devices_of_the_node(aws, tmp_path, as_head):
    commands = commands_on_the_host(aws, as_head, tmp_path)
    registry = aws["config"]["docker"]["image"].partition("/")[0]
    login = next(i for i, each in enumerate(commands) if "docker login" in each)
    pull = next(i for i, each in enumerate(commands) if f"docker pull {registry}" in each)
    assert login < pull
    assert registry in commands[login]
    assert f"--region {aws['config']['provider']['region']}" in commands[login]
    [run] = [each for each in commands if "docker run" in each]
    for option in ("--ulimit memlock=-1:-1", "--ipc=host", "--net=host", "/home/nltrain/.nltrain/env"):
        assert option in run
    for option in ("--device /dev/infiniband", "--gpus all"):
        assert (option in run) is not as_head
    # A variable without a value would be read on the host, where nobody has set it.
    assert not re.search(r"-e \w+(\s|$)", run)


def test_what_ray_starts_knows_the_variables_of_the_users_file(aws, tmp_path):
    """The lines run in a shell, with `ray` replaced by a print of what it would inherit."""
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        [line] = [line for line in aws["config"][name] if "ray start" in line]
        (tmp_path / ".nltrain").mkdir(exist_ok=True)
        (tmp_path / ".nltrain" / "env").write_text("WANDB_API_KEY=abc\n")
        (tmp_path / "ray").write_text('#!/bin/sh\necho "$WANDB_API_KEY $RAY_AUTH_MODE"\n')
        (tmp_path / "ray").chmod(0o755)
        line = line.replace("ulimit -n 65536", "true")
        environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["abc", "token"]
