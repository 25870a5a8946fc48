"""Feature gates: which there are, at which stage each is, and what is on.

Those of Kubernetes 1.20 and 1.25, as the later of the two has them, and a few of proxies that came after; what is done
here by itself is beta, and on. Nearly all are other programs': they are known so that a misspelt one can be told from
them. IN_USE has those that change something here.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping, Sequence

from userspace_proxy.config.values import parse_switch

Gates = tuple[tuple[str, bool], ...]
"""What was set, in the order in which it was: what comes later counts."""


class Stage(enum.StrEnum):
    ALPHA = "alpha"
    BETA = "beta"


_ALPHA = """
    APIServerIdentity APIServerTracing BalanceAttachedNodeVolumes BoundServiceAccountTokenVolume
    CPUManagerPolicyAlphaOptions CSIMigrationAWSComplete CSIMigrationAzureDiskComplete CSIMigrationAzureFileComplete
    CSIMigrationGCEComplete CSIMigrationOpenStackComplete CSIMigrationRBD CSINodeExpandSecret CSIStorageCapacity
    CSIVolumeFSGroupPolicy CSIVolumeHealth ConfigurableFSGroupPolicy ContainerCheckpoint CustomCPUCFSQuotaPeriod
    DefaultPodTopologySpread DisableAcceleratorUsageMetrics DisableCloudProviders
    DisableKubeletCloudCredentialProviders EphemeralContainers ExpandedDNSConfig GenericEphemeralVolume
    HPAContainerMetrics HPAScaleToZero HonorPVReclaimPolicy HyperVContainer IPTablesOwnershipCleanup
    InTreePluginAWSUnregister InTreePluginAzureDiskUnregister InTreePluginAzureFileUnregister
    InTreePluginGCEUnregister InTreePluginOpenStackUnregister InTreePluginPortworxUnregister
    InTreePluginRBDUnregister InTreePluginvSphereUnregister JobPodFailurePolicy KMSv2 KubeletInUserNamespace
    KubeletTracing LoggingAlphaOptions MatchLabelKeysInPodTopologySpread MaxUnavailableStatefulSet MemoryQoS
    MultiCIDRRangeAllocator NetworkPolicyStatus NodeInclusionPolicyInPodTopologySpread NodeOutOfServiceVolumeDetach
    NodeSwap PodAndContainerStatsFromCRI PodDisruptionConditions PodHasNetworkCondition ProcMountType QOSReserved
    ReadWriteOncePod RecoverVolumeExpansionFailure RemoveSelfLink RetroactiveDefaultStorageClass
    SELinuxMountReadWriteOncePod ServiceAccountIssuerDiscovery ServiceTopology SetHostnameAsFQDN
    StatefulSetAutoDeletePVC StorageVersionAPI TTLAfterFinished UserNamespacesStatelessPodsSupport
    VolumeCapacityPriority WinDSR WindowsEndpointSliceProxying
"""
_BETA_ON = """
    APIListChunking APIPriorityAndFairness APIResponseCompression AllowInsecureBackendProxy AnyVolumeDataSource
    AppArmor CPUManager CPUManagerPolicyBetaOptions CPUManagerPolicyOptions CRIContainerLogRotation CSIInlineVolume
    CSIMigration CSIMigrationAzureFile CSIMigrationvSphere ContextualLogging CronJobTimeZone
    CustomResourceValidationExpressions DelegateFSGroupToCSIDriver DevicePlugins DownwardAPIHugePages
    DynamicKubeletConfig EndpointSlice EndpointSliceProxying EndpointSliceTerminatingCondition ExpandCSIVolumes
    ExpandInUsePersistentVolumes ExpandPersistentVolumes GRPCContainerProbe GracefulNodeShutdown
    GracefulNodeShutdownBasedOnPodPriority HugePageStorageMediumSize IPv6DualStack ImmutableEphemeralVolumes
    JobMutableNodeSchedulingDirectives JobReadyPods JobTrackingWithFinalizers KubeProxyDrainingTerminatingNodes
    KubeletCredentialProviders KubeletPodResources KubeletPodResourcesGetAllocatable LegacyNodeRoleBehavior
    LegacyServiceAccountTokenNoAutoGeneration LoadBalancerIPMode LocalStorageCapacityIsolation
    LocalStorageCapacityIsolationFSQuotaMonitoring LogarithmicScaleDown LoggingBetaOptions MemoryManager
    MinimizeIPTablesRestore MixedProtocolLBService NFTablesProxyMode NodeDisruptionExclusion NonPreemptingPriority
    OpenAPIEnums OpenAPIV3 PodDeletionCost PodDisruptionBudget PodOverhead PreferSameTrafficDistribution
    ProbeTerminationGracePeriod ProxyTerminatingEndpoints RemainingItemCount RotateKubeletServerCertificate
    RunAsGroup RuntimeClass SCTPSupport SeccompDefault SelectorIndex ServerSideApply ServerSideFieldValidation
    ServiceAppProtocol ServiceIPStaticSubrange ServiceInternalTrafficPolicy ServiceNodeExclusion
    ServiceTrafficDistribution SizeMemoryBackedVolumes StartupProbe StorageVersionHash SupportNodePidsLimit
    SupportPodPidsLimit Sysctls TokenRequest TokenRequestProjection TopologyAwareHints TopologyManager
    ValidateProxyRedirects VolumeSnapshotDataSource WarningHeaders WinOverlay WindowsHostProcessContainers
"""
_BETA_OFF = """
    CSIMigrationAWS CSIMigrationAzureDisk CSIMigrationGCE CSIMigrationOpenStack CSIMigrationPortworx
    CSIMigrationvSphereComplete ExperimentalHostUserNamespaceDefaulting MinDomainsInPodTopologySpread
"""
STAGES: Mapping[str, Stage] = {
    **dict.fromkeys(_ALPHA.split(), Stage.ALPHA),
    **dict.fromkeys((_BETA_ON + _BETA_OFF).split(), Stage.BETA),
}
_ON = frozenset(_BETA_ON.split())
_ALL = {"AllAlpha": Stage.ALPHA, "AllBeta": Stage.BETA}
IN_USE: Mapping[str, str] = {
    "EndpointSliceProxying": "On: an API server is asked for EndpointSlices where it has them. Off: for Endpoints.",
    "LoadBalancerIPMode": "Off: addresses of load balancers are captured whatever their ipMode is.",
    "SCTPSupport": "Off: service ports of SCTP are passed over.",
    "ServiceInternalTrafficPolicy": "Off: internalTrafficPolicy is passed over.",
    "ServiceTrafficDistribution": "Off: trafficDistribution is passed over.",
    "TopologyAwareHints": "Off: hints for zones, which endpoints carry, are passed over.",
    "PreferSameTrafficDistribution": "Off: hints for nodes, which endpoints carry, are passed over.",
    "ProxyTerminatingEndpoints": "Off: endpoints that terminate take clients only while they are ready.",
}
"""What a gate changes here."""


def parse_gates(text: str) -> Gates:
    """`SCTPSupport=true,AllAlpha=false`; blanks around a pair are dropped, as in Go."""
    return tuple(_pair(pair.strip()) for pair in text.split(",") if pair.strip())


def _pair(text: str) -> tuple[str, bool]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"{text!r} has no '='")
    if name not in STAGES and name not in _ALL:
        near = difflib.get_close_matches(name, [*STAGES, *_ALL], n=1)
        raise ValueError(f"there is no feature gate {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return name, parse_switch(value)
    except ValueError as why:
        raise ValueError(f"{text!r} is {why}") from None


def show_gates(gates: Gates) -> str:
    return ",".join(f"{name}={str(on).lower()}" for name, on in dict(gates).items())


def is_on(gates: Gates, name: str) -> bool:
    """By its own name, else with all of its stage, else as it is by itself."""
    last = dict(gates)
    for setter in (name, *(all_of for all_of, stage in _ALL.items() if stage is STAGES[name])):
        if setter in last:
            return last[setter]
    return name in _ON


def without_effect(gates: Gates) -> Sequence[str]:
    """Those that were set to something else than they are by themselves, and change nothing here."""
    return [name for name, on in dict(gates).items() if name in STAGES and name not in IN_USE and on != (name in _ON)]
