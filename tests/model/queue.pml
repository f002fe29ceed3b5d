/* A model of the queue, for spin: processes ask for GPU memory and RAM with a priority, wait, hold both together and give
   them back; the priority ages, as a step of it is worth PLACES places.

   What must hold: neither GPU memory nor RAM is promised beyond what there is (in `give`), and each request is passed less
   than PLACES times by those that asked after it and take some of what it asks for (in `give`): so nobody waits for ever,
   if holders give back some time. A request is granted its GPU memory and its RAM together.

   `grant` is that of core.claims for one GPU: in the order of the queue a request that fits is given its memory; one that
   would fit if all were released blocks what it asks for; those behind it get nothing of that.

   Places are counted from the first request that waits, and gaps of more than PLACES are shortened to PLACES + 1, which
   changes no order: so the numbers stay small.

   Not in it: what is used, readings, dying (promises.pml has them), several GPUs, and time: so no request passes because it
   ends soon (core.passing).

   With one of these defined something is wrong, and spin has to find it:
     NO_AGEING      a priority counts more than any place
     NO_BLOCKING    a request that does not fit blocks nothing
     PART_OF_BOTH   GPU memory is given when it fits, and RAM is not looked at
*/
#ifndef PROCESSES
#define PROCESSES 3
#endif
#ifndef PLACES
#define PLACES 2
#endif
#define GPU 2                          /* units of each */
#define RAM 2

#define NONE 0
#define WAITS 1
#define HOLDS 2

byte state[PROCESSES];
byte gpu[PROCESSES];                   /* what it asks for, or holds */
byte ram[PROCESSES];
bool later[PROCESSES];                 /* its priority is a step behind */
byte place[PROCESSES];                 /* in the order of asking */
byte passed[PROCESSES];                /* by so many that came later and were granted before it */
byte last;                             /* the place that was given last */

hidden byte i, j, best, rank, seen, old, new;
hidden byte used_gpu, used_ram;
hidden byte no_gpu, no_ram;            /* blocked */

/* What is held now */
inline measure() {
    used_gpu = 0; used_ram = 0; j = 0;
    do
    :: j < PROCESSES ->
        if :: state[j] == HOLDS -> used_gpu = used_gpu + gpu[j]; used_ram = used_ram + ram[j] :: else fi;
        j++
    :: else -> break
    od
}

#ifdef NO_AGEING
#define RANK(process) (place[process] + (later[process] -> 100 : 0))
#else
#define RANK(process) (place[process] + (later[process] -> PLACES : 0))
#endif

/* The next request in the queue that is not in `seen`, a set of bits: `best`, PROCESSES if there is none */
inline find_next() {
    best = PROCESSES; rank = 255; j = 0;
    do
    :: j < PROCESSES ->
        if
        :: state[j] == WAITS && !((seen >> j) & 1) &&
           (RANK(j) < rank || (RANK(j) == rank && place[j] < place[best])) -> best = j; rank = RANK(j)
        :: else
        fi;
        j++
    :: else -> break
    od
}

/* Give a request what it asks for */
inline give(process) {
    state[process] = HOLDS; j = 0;
    do
    :: j < PROCESSES ->
        if
        :: state[j] == WAITS && place[j] < place[process] && (gpu[j] && gpu[process] || ram[j] && ram[process]) ->
            passed[j]++;
            assert(passed[j] < PLACES)           /* nobody waits for ever */
        :: else
        fi;
        j++
    :: else -> break
    od;
    place[process] = 0; passed[process] = 0; later[process] = false;
    measure();
    assert(used_gpu <= GPU && used_ram <= RAM)   /* neither is promised beyond what there is */
}

inline grant() {
    seen = 0; no_gpu = false; no_ram = false;
    do
    :: find_next();
        if
        :: best == PROCESSES -> break
        :: else ->
            seen = seen | (1 << best); i = best; measure();
            if
            :: (gpu[i] && no_gpu) || (ram[i] && no_ram) ->       /* one of them is blocked: it blocks the other, too */
                no_gpu = no_gpu || gpu[i]; no_ram = no_ram || ram[i]
            :: else ->
                if
#ifdef PART_OF_BOTH
                :: used_gpu + gpu[i] <= GPU -> give(i)
#else
                :: used_gpu + gpu[i] <= GPU && used_ram + ram[i] <= RAM -> give(i)
#endif
                :: else ->
#ifndef NO_BLOCKING
                    no_gpu = no_gpu || gpu[i]; no_ram = no_ram || ram[i]
#endif
                fi
            fi
        fi
    od;
    seen = 0; best = 0; rank = 0; i = 0; j = 0; used_gpu = 0; used_ram = 0; no_gpu = false; no_ram = false
}

/* Count places from the first request that waits */
inline count_anew() {
    seen = 0; old = 0; new = 0;
    do
    :: best = PROCESSES; rank = 255; j = 0;
        do
        :: j < PROCESSES ->
            if
            :: state[j] == WAITS && !((seen >> j) & 1) && place[j] < rank -> best = j; rank = place[j]
            :: else
            fi;
            j++
        :: else -> break
        od;
        if
        :: best == PROCESSES -> break
        :: else ->
            seen = seen | (1 << best);
            new = (new == 0 -> 1 : new + (rank - old > PLACES + 1 -> PLACES + 1 : rank - old));
            old = rank; place[best] = new
        fi
    od;
    last = (new == 0 -> 0 : new + (last - old > PLACES + 1 -> PLACES + 1 : last - old));
    seen = 0; old = 0; new = 0; best = 0; rank = 0; j = 0
}

/* Leave the queue, or give back what was granted */
inline leave() {
    state[me] = NONE; gpu[me] = 0; ram[me] = 0; place[me] = 0; passed[me] = 0; later[me] = false;
    grant();
    count_anew()
}

inline ask() {
    last++; place[me] = last; state[me] = WAITS;
    grant();
    count_anew()
}

proctype Process(byte me) {
    do
    :: atomic { state[me] == NONE ->
        if :: gpu[me] = 0 :: gpu[me] = 1 :: gpu[me] = GPU fi;
        if :: gpu[me] -> ram[me] = 0 :: ram[me] = 1 :: ram[me] = RAM fi;
        if :: later[me] = true :: later[me] = false fi;
        ask() }
    :: atomic { state[me] != NONE -> leave() }
    od
}

init {
    byte p = 0;
    atomic { do :: p < PROCESSES -> run Process(p); p++ :: else -> break od; p = 0 }
}
