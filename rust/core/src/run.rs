//! How a computation runs: on how many threads, and whether it should go on.

use crate::error::{Error, Result};
use crate::isa::InstructionSet;
use std::cell::OnceCell;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

/// Time between two questions whether to stop while others finish their work.
const BETWEEN_CHECKS: Duration = Duration::from_millis(10);

/// How thresholds are found; all methods find the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Method {
    /// Whatever is fastest for the input.
    #[default]
    Fastest,
    /// By a sort of all samples.
    Sort,
}

/// How many threads a call may use, and how it learns that it should stop.
pub struct Run<'a> {
    /// Asked for when first needed: the system takes longer to tell than a short call takes.
    threads: OnceCell<usize>,
    method: Method,
    instruction_set: InstructionSet,
    interrupted: &'a dyn Fn() -> bool,
}

impl Run<'static> {
    /// Run on `threads` threads, or on all the process may use for 0, to the end.
    pub fn on(threads: usize) -> Self {
        Self::interruptible(threads, &|| false)
    }
}

impl<'a> Run<'a> {
    /// The same, but give up with [`Error::Interrupted`] soon after `interrupted` returns true.
    ///
    /// Only the calling thread asks, between pieces of work.
    pub fn interruptible(threads: usize, interrupted: &'a dyn Fn() -> bool) -> Self {
        let threads = match threads {
            0 => OnceCell::new(),
            threads => OnceCell::from(threads),
        };
        Self {
            threads,
            method: Method::default(),
            instruction_set: InstructionSet::best(),
            interrupted,
        }
    }

    /// Use this method, where it applies.
    pub fn with_method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    /// Use these instructions.
    pub fn with_instruction_set(self, instruction_set: InstructionSet) -> Self {
        Self {
            instruction_set,
            ..self
        }
    }

    /// How thresholds are found.
    pub fn method(&self) -> Method {
        self.method
    }

    /// The instructions to use.
    pub fn instruction_set(&self) -> InstructionSet {
        self.instruction_set
    }

    /// How many threads there are to use.
    pub fn threads(&self) -> usize {
        let all = || thread::available_parallelism().map_or(1, NonZero::get);
        *self.threads.get_or_init(all)
    }

    /// The error to return if the caller wants to stop.
    pub fn check(&self) -> Result<()> {
        if (self.interrupted)() {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }

    /// Run `work` on every task, on as many threads as there are tasks and permission; results in the tasks' order.
    pub fn map<T: Send, R: Send>(
        &self,
        tasks: Vec<T>,
        work: impl Fn(T) -> R + Sync,
    ) -> Result<Vec<R>> {
        self.try_map(tasks, |task, _| Ok(work(task)))
    }

    /// The same for long tasks, each of which asks now and then whether to go on, and fails if not.
    pub fn try_map<T: Send, R: Send>(
        &self,
        tasks: Vec<T>,
        work: impl Fn(T, Check<'_>) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let mut results: Vec<Option<R>> = tasks.iter().map(|_| None).collect();
        let tasks = tasks.into_iter().enumerate().collect();
        let add = |done: &mut Vec<_>, (index, task), check: Check<'_>| {
            done.push((index, work(task, check)?));
            Ok(())
        };
        for (index, result) in self.share(tasks, Vec::new, add)?.into_iter().flatten() {
            results[index] = Some(result);
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Let each thread `work` tasks into a sum of its own, which it starts with `zero`; the sums in no order.
    pub fn fold<T: Send, A: Send>(
        &self,
        tasks: Vec<T>,
        zero: impl Fn() -> A + Sync,
        work: impl Fn(&mut A, T) + Sync,
    ) -> Result<Vec<A>> {
        self.share(tasks, zero, |sum, task, _| {
            work(sum, task);
            Ok(())
        })
    }

    /// The calling thread takes its share.  Threads are scoped: none outlives the call, none is kept, so a fork
    /// between calls is safe.  A thread the system refuses to start is done without.
    fn share<T: Send, A: Send>(
        &self,
        tasks: Vec<T>,
        zero: impl Fn() -> A + Sync,
        work: impl Fn(&mut A, T, Check<'_>) -> Result<()> + Sync,
    ) -> Result<Vec<A>> {
        let helpers = match tasks.len() {
            0 | 1 => 0,
            tasks => self.threads().min(tasks) - 1,
        };
        let queue = Mutex::new(tasks.into_iter());
        let (stop, helping) = (AtomicBool::new(false), AtomicUsize::new(0));
        let caller = thread::current();
        // Poisoning cannot matter: a panicking `work` holds no lock, and its panic resurfaces at the scope's end.
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let through = |check: Check<'_>| {
            let mut sum = zero();
            let mut all = || -> Result<()> {
                loop {
                    check()?;
                    let Some(task) = next() else { return Ok(()) };
                    work(&mut sum, task, check)?;
                }
            };
            let done = all();
            stop.fetch_or(done.is_err(), Ordering::Relaxed);
            done.map(|()| sum)
        };
        let stopped = || match stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        };
        let help = || {
            // Told when dropped, so that the caller hears of a panic too.
            let _leaving = Leaving {
                helping: &helping,
                caller: &caller,
            };
            through(&stopped)
        };
        thread::scope(|scope| {
            let handles: Vec<_> = (0..helpers)
                .map_while(|_| {
                    helping.fetch_add(1, Ordering::Relaxed);
                    let started = thread::Builder::new().spawn_scoped(scope, help).ok();
                    helping.fetch_sub(usize::from(started.is_none()), Ordering::Relaxed);
                    started
                })
                .collect();
            let asking = || stopped().and_then(|()| self.check());
            let mut done = through(&asking);
            while helping.load(Ordering::Acquire) > 0 {
                thread::park_timeout(BETWEEN_CHECKS);
                if done.is_ok()
                    && let Err(error) = asking()
                {
                    stop.store(true, Ordering::Relaxed);
                    done = Err(error);
                }
            }
            let mut sums = vec![done];
            for handle in handles {
                match handle.join() {
                    Ok(sum) => sums.push(sum),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            sums.into_iter().collect()
        })
    }
}

/// Asks whether to go on: the error to return if not.
pub type Check<'a> = &'a dyn Fn() -> Result<()>;

/// A helper that will have finished.
struct Leaving<'a> {
    helping: &'a AtomicUsize,
    caller: &'a Thread,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.helping.fetch_sub(1, Ordering::Release);
        self.caller.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::Barrier;
    use std::time::Instant;

    #[test]
    fn results_keep_the_order_of_tasks() {
        for threads in [1, 2, 7] {
            let squares = Run::on(threads).map((0..100u64).collect(), |i| i * i);
            assert_eq!(squares, Ok((0..100).map(|i| i * i).collect()));
        }
        assert_eq!(Run::on(3).map(Vec::<u8>::new(), |i| i), Ok(vec![]));
    }

    #[test]
    fn an_interrupt_ends_the_work() {
        let asked = Cell::new(0);
        let interrupted = || asked.replace(asked.get() + 1) >= 3;
        let run = Run::interruptible(1, &interrupted);
        assert_eq!(run.map(vec![(); 1000], |()| ()), Err(Error::Interrupted));
        assert_eq!(asked.get(), 4);
    }

    #[test]
    fn the_last_long_task_of_another_thread_is_interrupted() {
        let start = Instant::now();
        let interrupted = || start.elapsed() > Duration::from_millis(50);
        let run = Run::interruptible(2, &interrupted);
        let (caller, both) = (thread::current().id(), Barrier::new(2));
        let done = run.try_map(vec![(); 2], |(), check| {
            both.wait();
            while thread::current().id() != caller && start.elapsed() < Duration::from_secs(20) {
                check()?;
            }
            Ok(())
        });
        assert_eq!(done, Err(Error::Interrupted));
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
