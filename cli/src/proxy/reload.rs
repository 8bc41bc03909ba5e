//! Brings a changed configuration into force while the proxy runs: when the file changes, on SIGHUP, and when the admin address is
//! asked to. A file that cannot work leaves the one before in force; the log and a metric say so.

use std::path::Path;
use std::time::{Duration, SystemTime};

use mandoline_proxy::reload::{Asked, ReloadError, Reloader};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::failure::Failure;
use crate::proxy::ProxyArgs;
use crate::proxy::clerks::Clerks;
use crate::proxy::settings::Settings;

/// How often the file is looked at. An operator who has saved it looks at the log within a second or two.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Reloads whenever there is reason to, until told to stop. Gives the clerks back.
pub(crate) async fn run(
    args: ProxyArgs,
    mut clerks: Clerks,
    reloader: Reloader,
    stop: CancellationToken,
) -> Clerks {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else {
        error!("SIGHUP cannot be listened for, so the configuration stays as it is");
        stop.cancelled().await;
        return clerks;
    };
    let mut asked: mpsc::Receiver<Asked> = reloader.asked();
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = args.config.as_deref().and_then(Look::at);
    loop {
        let answer = tokio::select! {
            () = stop.cancelled() => return clerks,
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
        let done = reload(&args, &mut clerks, &reloader).await;
        match &done {
            Ok(()) => info!("The configuration was read again"),
            Err(failure) => error!(%failure, "The configuration stays as it was"),
        }
        if let Some(asked) = answer {
            asked.answer(done.map_err(|failure| failure.to_string()));
        }
    }
}

async fn reload(args: &ProxyArgs, clerks: &mut Clerks, reloader: &Reloader) -> Result<(), Failure> {
    // Also where the file cannot work: the log is moved away whatever that says.
    reloader.reopen_log();
    let mut read = || -> Result<_, Failure> {
        let settings = Settings::of(args.clone())?;
        let config = settings.config(clerks)?;
        Ok((settings, config))
    };
    let (settings, config) = read().inspect_err(|_| reloader.refused())?;
    let (jobs, lookups) = (config.jobs.clone(), config.lookups.clone());
    reloader.reload(config).await.map_err(|error| match error {
        ReloadError::Config(error) => settings.explain(&error),
        error => Failure::new(error),
    })?;
    clerks.keep(&jobs);
    clerks.keep_lookups(&lookups);
    Ok(())
}

/// What tells one state of a file from another.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    changed: Option<SystemTime>,
    length: u64,
    inode: u64,
}

impl Look {
    fn at(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;

        let metadata = std::fs::metadata(path).ok()?;
        let changed = metadata.modified().ok();
        Some(Self { changed, length: metadata.len(), inode: metadata.ino() })
    }
}
