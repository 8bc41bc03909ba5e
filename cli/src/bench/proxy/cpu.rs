//! The processor: which core a process runs on, and what it has used by the kernel's own count.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

/// Where the proxies run, one at a time.
pub(crate) const PROXY_CORE: u8 = 0;
/// Where the load comes from, and the tasks answer.
pub(crate) const LOAD_CORE: u8 = 1;

/// Gives the command that runs a program on one core.
pub(crate) fn on_core(
    core: u8,
    program: &Path,
    words: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Command {
    let mut command = Command::new("taskset");
    command.arg("-c").arg(core.to_string()).arg(program).args(words);
    command
}

/// Adds up what the threads of a process have run. Threads that ended meanwhile are missing; none of those that serve do.
pub(crate) fn used(process: u32) -> anyhow::Result<Duration> {
    let threads = format!("/proc/{process}/task");
    let mut nanos = 0;
    for thread in fs::read_dir(&threads).with_context(|| format!("cannot read {threads}"))? {
        // One that ends while we look has nothing to read any more.
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        let ran = text.split(' ').next().unwrap_or_default();
        nanos += ran.parse::<u64>().with_context(|| format!("{threads} says {text:?}"))?;
    }
    Ok(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_seen_in_the_kernel_s_count() {
        let before = used(std::process::id()).unwrap();
        let mut sum = 0_u64;
        while used(std::process::id()).unwrap() == before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
    }
}
