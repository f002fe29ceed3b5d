/* The simulated GPUs of queues.py for a program that is not Python: the functions of libnvidia-ml that a scheduler
 * calls. It reads the same folder as simulate.SimulatedDriver(shared=...): a file for each allocation, named
 * GPU_PID_START_BYTES_ID. QUEUES_GPUS is how many there are, QUEUES_MB the memory of each, QUEUES_CARDS the folder.
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long bytes;
typedef struct { bytes total, free, used; } memory;
typedef struct { unsigned version; bytes total, reserved, free, used; } memory_2;
typedef struct { unsigned pid; bytes used; unsigned instance, compute; } process;

static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
static int place(void *device) { return (int)(size_t)device - 1; }

/* The processes on a GPU; their number, of which at most `room` are written */
static unsigned processes(int gpu, process *found, unsigned room, bytes *used) {
    DIR *folder = opendir(getenv("QUEUES_CARDS"));
    struct dirent *entry;
    unsigned count = 0;
    *used = 0;
    while (folder && (entry = readdir(folder))) {
        int on, pid;
        bytes size;
        if (sscanf(entry->d_name, "%d_%d_%*[^_]_%llu_", &on, &pid, &size) != 3 || on != gpu || kill(pid, 0)) continue;
        *used += size;
        if (count < room) found[count] = (process){pid, size, -1, -1};
        count++;
    }
    if (folder) closedir(folder);
    return count;
}

static int text(char *to, unsigned length, const char *from) { snprintf(to, length, "%s", from); return 0; }

int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(to, length, "580.105.08"); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = number("QUEUES_GPUS"); return 0; }
int nvmlDeviceGetName(void *device, char *to, unsigned length) { return text(to, length, "NVIDIA L4"); }
int nvmlDeviceGetIndex(void *device, unsigned *index) { *index = place(device); return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= (unsigned)number("QUEUES_GPUS")) return 2;
    *device = (void *)(size_t)(index + 1);
    return 0;
}

int nvmlDeviceGetUUID(void *device, char *to, unsigned length) {
    snprintf(to, length, "GPU-51000000-0000-4000-8000-%012d", place(device));
    return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)(size_t)(atoi(uuid + strlen(uuid) - 6) + 1);
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *device, memory *to) {
    processes(place(device), NULL, 0, &to->used);
    to->total = (bytes)number("QUEUES_MB") << 20;
    to->free = to->total > to->used ? to->total - to->used : 0;
    return 0;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, memory_2 *to) {
    memory found;
    nvmlDeviceGetMemoryInfo(device, &found);
    to->total = found.total, to->free = found.free, to->used = found.used, to->reserved = 0;
    return 0;
}

int nvmlDeviceGetUtilizationRates(void *device, unsigned *to) {
    bytes used;
    processes(place(device), NULL, 0, &used);
    to[0] = to[1] = used ? 50 : 0;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *to) {
    bytes used;
    unsigned room = to ? *count : 0;
    *count = processes(place(device), to, room, &used);
    return *count > room ? 7 : 0;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, process *to) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, to);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, process *to) { *count = 0; return 0; }
int nvmlDeviceGetGraphicsRunningProcesses_v2(void *device, unsigned *count, process *to) { *count = 0; return 0; }
