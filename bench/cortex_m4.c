/* Plays what `sparsefold export-c` wrote on a Cortex-M4 without an operating system. Built and run by bench/device.py, in emulation:
 * under `-icount shift=0` an instruction lasts a nanosecond of the virtual clock, and SysTick, at 25 MHz, counts forty of them.
 *
 * played.h defines INPUT, the type of one input, INPUT_SIZE, its length, STEPS and INPUTS. For each step the bits of its outputs are
 * printed, then the ticks of all steps. STRAIGHT says that an input is passed as it is, a token.
 */
#include <stdint.h>

#include "net.h"
#include "played.h"

#define CPACR (*(volatile uint32_t *)0xE000ED88)
#define SYSTICK ((volatile uint32_t *)0xE000E010) /* control, reload, value */

void start(void);
__attribute__((section(".vectors"), used)) static const uintptr_t vectors[2] = {0x20400000, (uintptr_t)start};

static net_state state;
static float y[NET_OUTPUTS];
static const INPUT inputs[STEPS][INPUT_SIZE] = INPUTS;

/* Semihosting: operation and argument in r0 and r1. */
static int host(int operation, const void *argument)
{
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void print(uint32_t value)
{
    char text[10];
    int k;
    for (k = 7; k >= 0; --k, value >>= 4) text[k] = "0123456789abcdef"[value & 15];
    text[8] = ' ';
    text[9] = 0;
    host(4, text);
}

void start(void)
{
    uint32_t ticks = 0, t, j;
    CPACR |= 0xF << 20; /* the FPU */
    __asm__ volatile("dsb\nisb");
    SYSTICK[1] = 0xFFFFFF;
    SYSTICK[2] = 0;
    SYSTICK[0] = 5; /* runs at the processor's clock, interrupts nobody */
    net_reset(&state);
    for (t = 0; t < STEPS; ++t) {
        const uint32_t began = SYSTICK[2];
#ifdef STRAIGHT
        const int failed = net_step(&state, inputs[t][0], y);
#else
        const int failed = net_step(&state, inputs[t], y);
#endif
        ticks += (began - SYSTICK[2]) & 0xFFFFFF; /* it counts down */
        if (failed) break;
        for (j = 0; j < NET_OUTPUTS; ++j) {
            union {
                float value;
                uint32_t bits;
            } u;
            u.value = y[j];
            print(u.bits);
        }
    }
    print(ticks);
    host(0x18, (const void *)0x20026); /* the application ended */
    for (;;) {
    }
}
