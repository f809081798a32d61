/*
 * The guest of qemu.py: its own firmware, without any other program in it. On the machine that it starts on it fills a
 * region with a rule and says so; once it has been moved it touches pages of the region one by one, each once, takes
 * the time of each, compares all of the page with the rule, and tells everything through the debug console.
 *
 * It runs in long mode at privilege level 3 (with the right to do I/O): software implementations of KVM run only such
 * code on the processor, and interpret the rest, which would be most of what is measured.
 *
 * PAGES (a power of two), HALF (half of its bits, rounded up), TOUCHES: see qemu.py, which assembles this.
 */
        .set    CONSOLE, 0xe9
        .set    HERE, 0xe9              /* what the console reads as on the machine it starts on, see qemu.py */
        .set    TABLES, 0x1000          /* page tables, four pages */
        .set    STACK, 0x7000
        .set    LOW, 0x8000             /* the code's copy: the ROM is not in the page tables */
        .set    REPORT, 0x100000        /* begun, ended (ticks, 64 bits each), wrong pages, 0, ticks of each touch */
        .set    TOOK, REPORT + 24
        .set    REGION, 0x1000000
        .set    WORDS, 1024             /* of 4 bytes, in a page */
        .set    MIX, 0x9e3779b1
        .set    STEP, 0x01000193

        .text
        .globl  _start
_start:
        .code32
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        cld
        movl    $_start, %esi
        movl    $LOW, %edi
        movl    $WORDS, %ecx
        rep movsl
        movl    $LOW + (low - _start), %eax
        jmp     *%eax
low:    lgdtl   LOW + (low_table - _start)
        movl    $TABLES + 0x1007, TABLES        /* present, writable, for all */
        movl    $TABLES + 0x2007, TABLES + 0x1000
        movl    $TABLES + 0x3007, TABLES + 0x1008
        movl    $TABLES + 0x2000, %edi
        movl    $0x87, %eax                     /* 2 MiB each: the first 2 GiB where they are */
1:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        cmpl    $0x80000087, %eax
        jne     1b
        movl    $TABLES, %eax
        movl    %eax, %cr3
        movl    %cr4, %eax
        orl     $0x20, %eax                     /* PAE */
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx               /* EFER: long mode */
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax               /* paging */
        movl    %eax, %cr0
        ljmpl   $0x18, $LOW + (long - _start)

        .code64
long:   movl    $STACK, %esp
        pushq   $0x23
        pushq   $STACK
        pushq   $0x3002                         /* I/O at level 3, no interrupts */
        pushq   $0x2b
        pushq   $LOW + (user - _start)
        iretq

user:   xorl    %ebx, %ebx
        movl    $REGION, %edi
fill:   leal    1(%rbx), %eax
        imull   $MIX, %eax, %eax
        movl    $WORDS, %ecx
1:      movl    %eax, (%rdi)
        addl    $4, %edi
        addl    $STEP, %eax
        decl    %ecx
        jnz     1b
        incl    %ebx
        cmpl    $PAGES, %ebx
        jne     fill
        movb    $'R', %al
        outb    %al, $CONSOLE

stay:   movl    $1000, %ecx
1:      pause
        decl    %ecx
        jnz     1b
        inb     $CONSOLE, %al
        cmpb    $HERE, %al
        je      stay

        movl    $REPORT, %edi                   /* or its pages would be missing between two touches */
        xorl    %eax, %eax
        movl    $TOUCHES + 6, %ecx
        rep stosl
        xorl    %ebx, %ebx                      /* touches */
        xorl    %ebp, %ebp                      /* wrong pages */
        rdtsc
        movl    %eax, REPORT
        movl    %edx, REPORT + 4
        movb    $'B', %al
        outb    %al, $CONSOLE

touch:  imull   $MIX, %ebx, %eax                /* a permutation of the pages: each step can be undone */
        andl    $PAGES - 1, %eax
        movl    %eax, %edx
        shrl    $HALF, %edx
        xorl    %edx, %eax
        imull   $0x85ebca6b, %eax, %eax
        andl    $PAGES - 1, %eax
        movl    %eax, %edx
        shrl    $HALF, %edx
        xorl    %edx, %eax
        movl    %eax, %r8d
        movl    %eax, %esi
        shll    $12, %esi
        addl    $REGION, %esi

        lfence
        rdtsc
        lfence
        shlq    $32, %rdx
        leaq    (%rax, %rdx), %r9
        movl    (%rsi), %ecx                    /* here it waits */
        lfence
        rdtsc
        shlq    $32, %rdx
        orq     %rdx, %rax
        subq    %r9, %rax
        movq    %rax, %rdx
        shrq    $32, %rdx
        jz      1f
        movl    $-1, %eax
1:      movl    %eax, TOOK(, %rbx, 4)

        leal    1(%r8), %eax
        imull   $MIX, %eax, %eax
        movl    $WORDS, %ecx
1:      cmpl    %eax, (%rsi)
        jne     wrong
        addl    $4, %esi
        addl    $STEP, %eax
        decl    %ecx
        jnz     1b
next:   incl    %ebx
        cmpl    $TOUCHES, %ebx
        jne     touch

        rdtsc
        movl    %eax, REPORT + 8
        movl    %edx, REPORT + 12
        movl    %ebp, REPORT + 16
        movb    $'E', %al
        outb    %al, $CONSOLE
        movl    $REPORT, %esi
        movl    $TOUCHES * 4 + 24, %ecx
        movl    $CONSOLE, %edx
        rep outsb
1:      pause
        jmp     1b
wrong:  incl    %ebp
        jmp     next

        .balign 8                               /* accessed already: this may be ROM, which cannot note it */
table:  .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
rom_table:
        .word   rom_table - table - 1
        .long   table
low_table:
        .word   rom_table - table - 1
        .long   LOW + (table - _start)
        .code16
real:   cli
        lgdtl   %cs:rom_table - _start
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $8, $_start
        .org    0xfff0                          /* where a processor begins */
        jmp     real
        .org    0x10000
