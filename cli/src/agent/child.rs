//! The server as a child of the agent, as under a small init: what the agent is told by signals the child is told, and it
//! stops after its slices have moved away.
//!
//! The child has a process group of its own, so that Ctrl-C reaches the agent alone and the drain comes first. Nobody but
//! the child itself is reaped: where the agent is a container's first process and the server leaves grandchildren behind,
//! give the container an init.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// The server, under way.
#[derive(Debug)]
pub(crate) struct Child {
    process: tokio::process::Child,
    program: String,
}

impl Child {
    /// Starts it.
    pub(crate) fn spawn(command: &[OsString]) -> Result<Self, Failure> {
        let (program, args) = command.split_first().expect("a command has a word");
        let shown = program.to_string_lossy().into_owned();
        let process =
            Command::new(program).args(args).process_group(0).kill_on_drop(true).spawn().map_err(
                |error| {
                    Failure::new(format!("{shown} did not start"))
                        .because(error)
                        .try_this("check what stands behind `--`")
                },
            )?;
        Ok(Self { process, program: shown })
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> Result<ExitStatus, Failure> {
        self.process
            .wait()
            .await
            .map_err(|error| Failure::new(format!("{} is lost", self.program)).because(error))
    }

    /// Passes a signal on. One that has ended hears nothing, which is as good.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.process.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, signal).ok();
        }
    }

    /// Asks it to stop, and kills it if it has not ended in time. Ending so is a success.
    pub(crate) async fn stop(mut self, within: Duration) -> Result<ExitCode, Failure> {
        self.signal(Signal::TERM);
        let status = match tokio::time::timeout(within, self.ended()).await {
            Ok(status) => status?,
            Err(_) => {
                eprintln!("{} has not stopped within {within:?}: killed", self.program);
                self.signal(Signal::KILL);
                self.ended().await?
            }
        };
        let by_us = status.signal() == Some(Signal::TERM.as_raw());
        Ok(if by_us { ExitCode::SUCCESS } else { code(status) })
    }
}

/// What the agent ends with when the server has ended by itself: the same, or 128 and the signal, as shells say it.
pub(crate) fn code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// What the agent was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Leave: SIGTERM or SIGINT.
    Stop,
    /// Something that only the server understands, such as SIGHUP.
    Pass(Signal),
}

/// Hears signals. The listening task lives as long as the process.
pub(crate) fn signals() -> Result<mpsc::Receiver<Told>, Failure> {
    // Signals of one kind that nobody has taken yet are one: so many are never waiting.
    let (tell, told) = mpsc::channel(8);
    let heard = [
        (SignalKind::terminate(), Told::Stop),
        (SignalKind::interrupt(), Told::Stop),
        (SignalKind::hangup(), Told::Pass(Signal::HUP)),
        (SignalKind::quit(), Told::Pass(Signal::QUIT)),
        (SignalKind::user_defined1(), Told::Pass(Signal::USR1)),
        (SignalKind::user_defined2(), Told::Pass(Signal::USR2)),
    ];
    for (kind, means) in heard {
        let mut listener = signal(kind)
            .map_err(|error| Failure::new("cannot listen for signals").because(error))?;
        let tell = tell.clone();
        drop(tokio::spawn(async move {
            while listener.recv().await.is_some() && tell.send(means).await.is_ok() {}
        }));
    }
    Ok(told)
}

/// A process that is not the agent's child and is stopped after the drain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Other(Pid);

impl Other {
    /// Checks that the process is there and may be told something.
    pub(crate) fn find(pid: u32) -> Result<Self, Failure> {
        let cannot = || Failure::new(format!("process {pid} cannot be stopped after the drain"));
        let found = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let found = found.ok_or_else(|| cannot().because("that is no process id"))?;
        test_kill_process(found).map_err(|error| cannot().because(error))?;
        Ok(Self(found))
    }

    /// Asks it to stop. One that has ended is as good.
    pub(crate) fn stop(self) {
        kill_process(self.0, Signal::TERM).ok();
    }
}
