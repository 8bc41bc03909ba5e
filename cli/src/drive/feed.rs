//! Where the events come from: a file, read by a thread that stays a little ahead, or a law.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use mandoline_core::prng::Prng;
use mandoline_sim::access_log::KeyPart;
use mandoline_sim::event::Event;
use mandoline_sim::lines::InputError;
use mandoline_sim::replay::{Replay, Skipped};
use mandoline_sim::spread::Spread;
use mandoline_sim::workload::{Sampler, Workload};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::drive::ledger::Ledger;

/// The events of a load, one after the other.
pub(crate) enum Feed {
    Recorded {
        ahead: VecDeque<Event>,
        // Bounded by `BATCHES`: the reader waits for the driver.
        batches: mpsc::Receiver<Result<Batch, InputError>>,
        reader: JoinHandle<()>,
    },
    Made {
        sampler: Sampler,
        prng: Prng,
    },
}

/// Some events, and what the reader has seen up to their end.
pub(crate) struct Batch {
    events: Vec<Event>,
    pass: u64,
    skipped: Skipped,
}

impl Feed {
    /// Opens a file, and reads it over and over if it is to be repeated.
    pub(crate) async fn recorded(
        path: PathBuf,
        key: Option<KeyPart>,
        repeat: bool,
    ) -> Result<Self, InputError> {
        let (opened, key, path) =
            spawn_blocking(move || (Replay::open(&path, key.as_ref()), key, path))
                .await
                .expect("opening does not panic, and blocking tasks are not aborted");
        let first = opened?;
        let (sender, batches) = mpsc::channel(BATCHES);
        let reader = spawn_blocking(move || {
            let reopen = || Replay::open(&path, key.as_ref());
            if let Err(error) = read(first, reopen, repeat, &sender) {
                // No one to tell when the driver has gone.
                drop(sender.blocking_send(Err(error)));
            }
        });
        Ok(Self::Recorded { ahead: VecDeque::new(), batches, reader })
    }

    /// Draws keys.
    pub(crate) fn made(workload: Workload, seed: u64) -> Self {
        Self::Made { sampler: workload.sampler(), prng: Prng::new(seed) }
    }

    /// Gives the next event; `None` at the end.
    pub(crate) async fn next(&mut self, ledger: &Ledger) -> Result<Option<Event>, InputError> {
        match self {
            Self::Recorded { ahead, batches, .. } => {
                while ahead.is_empty() {
                    let Some(batch) = batches.recv().await else { return Ok(None) };
                    let batch = batch?;
                    ledger.pass(batch.pass, batch.skipped);
                    ahead.extend(batch.events);
                }
                Ok(ahead.pop_front())
            }
            Self::Made { sampler, prng } => {
                let key = sampler.draw(prng).to_string().into();
                Ok(Some(Event { at: Duration::ZERO, key, weight: 1, bytes: None }))
            }
        }
    }

    /// Ends the reader, unless it is stuck: a pipe that nobody writes to cannot be given up, only left.
    pub(crate) async fn close(self) {
        if let Self::Recorded { batches, reader, .. } = self {
            drop(batches);
            if let Ok(ended) = timeout(CLOSE_PATIENCE, reader).await {
                ended.expect("the reader does not panic, and blocking tasks are not aborted");
            }
        }
    }
}

/// Reads pass after pass, until the end or until nobody listens.
fn read(
    mut replay: Replay,
    reopen: impl Fn() -> Result<Replay, InputError>,
    repeat: bool,
    sender: &mpsc::Sender<Result<Batch, InputError>>,
) -> Result<(), InputError> {
    let mut offset = Duration::ZERO;
    for pass in 1.. {
        let (mut last, mut count) = (Duration::ZERO, 0_u32);
        let (mut spread, mut at_end) = (Spread::default(), false);
        while !at_end {
            let mut events = Vec::with_capacity(BATCH_EVENTS);
            while events.len() < BATCH_EVENTS && !at_end {
                match replay.next().transpose()? {
                    Some(event) => {
                        last = event.at;
                        count = count.saturating_add(1);
                        spread.push(event, &mut events);
                    }
                    None => {
                        spread.finish(&mut events);
                        at_end = true;
                    }
                }
            }
            for event in &mut events {
                event.at = event.at.saturating_add(offset);
            }
            let batch = Batch { events, pass, skipped: replay.skipped() };
            if sender.blocking_send(Ok(batch)).is_err() {
                return Ok(());
            }
        }
        if !repeat {
            break;
        }
        let gap = (last / count.max(1)).max(GAP_MIN);
        offset = offset.saturating_add(last).saturating_add(gap);
        replay = reopen()?;
    }
    Ok(())
}

/// Events that travel together (more where more had one time), so that the channel costs little for each.
const BATCH_EVENTS: usize = 256;
/// Batches that wait for the driver: a thousand events ahead hide any pause of the disk.
const BATCHES: usize = 4;
/// Between two passes of a recording whose events all have one time.
const GAP_MIN: Duration = Duration::from_millis(1);
/// A disk answers sooner.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
