/* Gives srun the options of pyxis and tells each task what they were set to, as PYXIS_STAND_IN_<OPTION>. No container is
 * started. As in pyxis's own default, sbatch does not know the options. */
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_stand_in, 1);

enum { LENGTH = 4096 };

static struct {
    const char *name;
    int has_value;
    char value[LENGTH];
} options[] = {
    {"container-image", 1, ""},    {"container-mounts", 1, ""},         {"container-workdir", 1, ""},
    {"container-name", 1, ""},     {"container-env", 1, ""},            {"container-writable", 0, ""},
    {"container-mount-home", 0, ""}, {"no-container-mount-home", 0, ""},
};

enum { COUNT = sizeof options / sizeof options[0] };

static int take(int which, const char *value, int remote)
{
    (void)remote;
    snprintf(options[which].value, LENGTH, "%s", value ? value : "1");
    return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    if (spank_context() == S_CTX_ALLOCATOR)
        return 0;
    for (int i = 0; i < COUNT; i++) {
        struct spank_option option = {(char *)options[i].name, options[i].has_value ? "VALUE" : NULL,
                                      "shown to the task, nothing else", options[i].has_value, i, take};
        if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    for (int i = 0; i < COUNT; i++) {
        char variable[64] = "PYXIS_STAND_IN_";
        size_t end = strlen(variable);
        if (!options[i].value[0])
            continue;
        for (const char *c = options[i].name; *c; c++)
            variable[end++] = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
        variable[end] = 0;
        spank_setenv(spank, variable, options[i].value, 1);
    }
    return 0;
}
