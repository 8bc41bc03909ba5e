//! Brings a changed configuration into force while the proxy runs: when the file changes, on SIGHUP, and when the admin address is
//! asked to. A file that cannot work leaves the one before in force; the log and a metric say so.

use std::time::Duration;

use mandoline_proxy::look::Look;
use mandoline_proxy::reload::{ReloadError, ReloadRequest, Reloader};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::failure::Failure;
use crate::proxy::ProxyArgs;
use crate::proxy::kept::{Kept, Parts};
use crate::proxy::settings::Settings;

/// How often the file is looked at. An operator who has saved it looks at the log within a second or two.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long new clerks may take to hear who serves what, before those of before stay.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// Reloads whenever there is reason to, until told to stop: also if the file is no longer as it was `seen` before it was first read, with
/// what it said when the proxy was `started`. Gives back what is kept.
pub(crate) async fn run(
    args: ProxyArgs,
    started: Settings,
    mut seen: Option<Look>,
    mut kept: Kept,
    reloader: Reloader,
    stop: CancellationToken,
) -> Kept {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else {
        error!("SIGHUP cannot be listened for, so the configuration stays as it is");
        stop.cancelled().await;
        return kept;
    };
    let mut asked: mpsc::Receiver<ReloadRequest> = reloader.asked();
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let answer = tokio::select! {
            () = stop.cancelled() => return kept,
            _ = hangups.recv() => None,
            Some(asked) = asked.recv() => Some(asked),
            _ = look.tick() => {
                let Some(path) = args.config.as_deref() else { continue };
                let now = Look::at(path);
                // A file that is gone for a moment is being replaced.
                if now.is_none() || now == seen {
                    continue;
                }
                seen = now;
                None
            }
        };
        let done = reload(&args, &started, &mut kept, &reloader, &stop).await;
        match &done {
            Ok(()) => info!("The configuration was read again"),
            Err(failure) => error!(%failure, "The configuration stays as it was"),
        }
        if let Some(asked) = answer {
            asked.answer(done.map_err(|failure| failure.to_string()));
        }
    }
}

async fn reload(
    args: &ProxyArgs,
    started: &Settings,
    kept: &mut Kept,
    reloader: &Reloader,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    // Also where the file cannot work: the log is moved away whatever that says.
    reloader.reopen_log();
    let before = kept.parts();
    let done = change(args, started, kept, reloader, &before, stop).await;
    if done.is_err() {
        kept.go_back(before);
    }
    done
}

async fn change(
    args: &ProxyArgs,
    started: &Settings,
    kept: &mut Kept,
    reloader: &Reloader,
    before: &Parts,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    let mut read = || -> Result<_, Failure> {
        let settings = Settings::of(args.clone())?;
        if let Some(what) = settings.fixed(started) {
            return Err(Failure::new(ReloadError::Restart(what)));
        }
        let config = settings.config(kept)?;
        Ok((settings, config))
    };
    let (settings, config) = read().inspect_err(|_| reloader.refused())?;
    // A job that was served goes on being served.
    let ready = kept.ready_in_place_of(before, READY_WITHIN);
    tokio::select! {
        ready = ready => ready.inspect_err(|_| reloader.refused())?,
        () = stop.cancelled() => return Err(Failure::new("the proxy stops")),
    }
    let (jobs, lookups) = (config.jobs.clone(), config.lookups.clone());
    reloader.reload(config).await.map_err(|error| match error {
        ReloadError::Config(error) => settings.explain(&error),
        error => Failure::new(error),
    })?;
    kept.keep(&jobs);
    kept.keep_lookups(&lookups);
    Ok(())
}
