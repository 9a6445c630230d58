/* The few functions of libnvidia-ml.so.1 that libc10_cuda.so looks up; each returns success and says nothing. */
#define SUCCEEDS(name) \
  int name(void) { return 0; }

SUCCEEDS(nvmlInit_v2)
SUCCEEDS(nvmlDeviceGetHandleByPciBusId_v2)
SUCCEEDS(nvmlDeviceGetNvLinkRemoteDeviceType)
SUCCEEDS(nvmlDeviceGetNvLinkRemotePciInfo_v2)
SUCCEEDS(nvmlDeviceGetComputeRunningProcesses)
SUCCEEDS(nvmlSystemGetCudaDriverVersion_v2)
SUCCEEDS(nvmlDeviceGetGpuFabricInfoV)
