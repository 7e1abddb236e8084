// An x86 CPU that tells less of itself than it can do, at native speed. LD_PRELOAD of a Python whose onnxruntime has
// had each `cpuid` (0F A2) made 06 A2 (see x86.py). 06 is no instruction in 64-bit mode: it raises SIGILL, the handler
// executes the real cpuid, clears the bits of PACKLIGHT_MASK, and goes on behind it. /proc/cpuinfo is PACKLIGHT_CPUINFO.
//
//   PACKLIGHT_MASK=full     nothing is hidden
//   PACKLIGHT_MASK=avx512   AVX512 and AVX2, no VNNI, no AMX      (Skylake-SP)
//   PACKLIGHT_MASK=avx2     AVX2 alone                            (Haswell, Zen 2)
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <ucontext.h>

enum { EAX, EBX, ECX, EDX };
struct hidden { unsigned leaf, subleaf, reg, bits; };
#define BIT(n) (1u << (n))

// Intel SDM volume 2, CPUID, leaf 7
static const struct hidden NO_VNNI_NO_AMX[] = {
    {7, 0, ECX, BIT(11)},                      // AVX512_VNNI
    {7, 0, EDX, BIT(22) | BIT(24) | BIT(25)},  // AMX-BF16, AMX-TILE, AMX-INT8
    {7, 1, EAX, BIT(4) | BIT(21)},             // AVX-VNNI, AMX-FP16
    {7, 1, EDX, BIT(4) | BIT(8) | BIT(10) | BIT(19)},  // AVX-VNNI-INT8, AMX-COMPLEX, AVX-VNNI-INT16, AVX10
};
static const struct hidden NO_AVX512[] = {
    {7, 0, EBX, BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)},  // F DQ IFMA PF ER CD BW VL
    {7, 0, ECX, BIT(1) | BIT(6) | BIT(12) | BIT(14)},         // VBMI VBMI2 BITALG VPOPCNTDQ
    {7, 0, EDX, BIT(2) | BIT(3) | BIT(8) | BIT(23)},          // 4VNNIW 4FMAPS VP2INTERSECT FP16
    {7, 1, EAX, BIT(5)},                                      // BF16
};

static int level;  // 0 full, 1 avx512, 2 avx2

static void hide(const struct hidden *table, size_t rows, unsigned leaf, unsigned subleaf, unsigned *regs) {
    for (size_t i = 0; i < rows; i++)
        if (table[i].leaf == leaf && table[i].subleaf == subleaf) regs[table[i].reg] &= ~table[i].bits;
}
#define HIDE(table, leaf, subleaf, regs) hide(table, sizeof table / sizeof *table, leaf, subleaf, regs)

static void on_illegal(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)g[REG_RIP];
    if (code[0] != 0x06 || code[1] != 0xa2) {  // not ours: the instruction runs again and ends the program
        signal(number, SIG_DFL);
        return;
    }
    unsigned leaf = (unsigned)g[REG_RAX], subleaf = (unsigned)g[REG_RCX], regs[4];
    __cpuid_count(leaf, subleaf, regs[EAX], regs[EBX], regs[ECX], regs[EDX]);
    if (level >= 1) HIDE(NO_VNNI_NO_AMX, leaf, subleaf, regs);
    if (level >= 2) HIDE(NO_AVX512, leaf, subleaf, regs);
    g[REG_RAX] = regs[EAX], g[REG_RBX] = regs[EBX], g[REG_RCX] = regs[ECX], g[REG_RDX] = regs[EDX];
    g[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    const char *mask = getenv("PACKLIGHT_MASK");
    if (!mask) return;
    level = !strcmp(mask, "avx2") ? 2 : !strcmp(mask, "avx512") ? 1 : 0;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGILL, &action, NULL);
}

static const char *seen(const char *path) {
    const char *instead = getenv("PACKLIGHT_CPUINFO");
    return instead && path && !strcmp(path, "/proc/cpuinfo") ? instead : path;
}

#define OPEN(name)                                                                 \
    int name(const char *path, int flags, ...) {                                   \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;    \
        va_end(rest);                                                              \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);             \
        return real(seen(path), flags, mode);                                      \
    }
OPEN(open)
OPEN(open64)
